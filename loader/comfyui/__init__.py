"""The door to ComfyUI, the only room that imports it: a file as a MODEL or a CLIP, and all that patches them."""
