"""A small convolutional network on images whose labels are partly wrong: a policy, and what one would take instead."""
