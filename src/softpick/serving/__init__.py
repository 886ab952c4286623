"""`softpick serve`: transformers' OpenAI-compatible server with softpick's models."""
