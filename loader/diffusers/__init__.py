"""The door to diffusers, the only room that imports it."""
