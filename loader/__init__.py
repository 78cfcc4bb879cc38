"""From the bytes of a GGUF file to a MODEL; see the map of the code in README.md."""
