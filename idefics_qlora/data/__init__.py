"""From rows to windows of tensors."""
