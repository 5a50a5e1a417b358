"""What these tests share."""

from tests.support.patience import patient_gateway

__all__ = ["patient_gateway"]
