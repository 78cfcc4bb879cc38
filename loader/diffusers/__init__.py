"""The door to diffusers, the only room that imports it and its transformers: a file as a model of theirs."""
