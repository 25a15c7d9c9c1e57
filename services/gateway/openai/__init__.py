"""OpenAI's REST APIs: chat completions, completions and responses, as bodies in and answers out."""
