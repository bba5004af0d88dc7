"""The demonstration behind ``libortho demo``: a real model, planted secrets, and both splits measured."""
