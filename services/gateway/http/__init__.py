"""The REST server: routes, bodies, errors, events, and the page for trying it out."""
