"""Drafters that ship with the project, one folder with a model card each."""
