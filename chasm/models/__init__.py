"""Models as plain ``torch.nn.Module``: the selective scan, Mamba blocks and Stage 1."""
