"""What tests of what is deployed share."""

from tests.deploy.containers import base, containers, image

__all__ = ["base", "containers", "image"]
