"""Images to tokens: frozen backbones and the token cache."""
