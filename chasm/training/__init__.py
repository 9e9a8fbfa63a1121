"""Training: LightningModules, callbacks, recipes and runs."""
