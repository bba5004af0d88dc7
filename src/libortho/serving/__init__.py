"""Answering requests over HTTP, each with the streams that its key allows."""
