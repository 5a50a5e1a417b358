/* From the initramfs to the guest's root file system. */
#ifndef TASKVM_BOOT_H
#define TASKVM_BOOT_H

#define ROOT_DISK "/dev/vda"

struct boot_ports {
	int control, fs, net;
};

/* Mount what the kernel offers, load the modules, find the disk and the ports, and move to the disk as root. */
void boot(struct boot_ports *ports);

#endif
