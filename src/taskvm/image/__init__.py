"""Guest images: kernel, modules and root file system, built from Debian's packages and named by digest."""
