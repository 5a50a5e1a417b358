"""taskvm: an untrusted Linux guest in a QEMU micro-VM, with mediated egress, injected secrets and served mounts."""

__version__ = "0.1.0"
