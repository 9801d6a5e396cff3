"""The terminal: what generate.py shows and reads there. Knows no files of models; imports llama."""
