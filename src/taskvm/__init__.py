"""taskvm: an untrusted Linux guest in a QEMU micro-VM, with mediated network, injected secrets and a programmable file system."""

__version__ = "0.1.0"
