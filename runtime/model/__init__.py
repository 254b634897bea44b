"""The models in plain PyTorch, under the published key names."""
