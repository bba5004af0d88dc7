"""Where an ortho stream sits: scores of weights, and supports of an exact size."""
