"""What training asks of features: reading them at points and boxes, losses, and measures without training."""
