"""The HTTP server: OpenAI's API over a llama.engine.Engine, and the page. serve.py runs it."""
