"""How a packed weight is held: as a tensor of comfy-kitchen, and a file as a state dict of such."""
