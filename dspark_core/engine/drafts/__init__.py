"""A round's drafts: for whom, from which source, and how long."""
