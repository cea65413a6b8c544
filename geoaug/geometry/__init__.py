"""Where each point, box and region of one view lies in another."""
