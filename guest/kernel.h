/* Constants of the kernel's interface that a bare musl tool chain does not bring. Sources: include/uapi/linux/. */
#ifndef TASKVM_KERNEL_H
#define TASKVM_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#define container_of(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))
#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))

/* asm-generic/unistd.h: equal on x86-64 and aarch64 */
#define SYSCALL_CLONE3 435
#define SYSCALL_CLOSE_RANGE 436

/* linux/sched.h: struct clone_args, version 2 (Linux 5.7) */
struct spawn_args {
	uint64_t flags, pidfd, child_tid, parent_tid, exit_signal;
	uint64_t stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};
#define SPAWN_VM 0x00000100ull
#define SPAWN_VFORK 0x00004000ull
#define SPAWN_PARENT_SETTID 0x00100000ull
#define SPAWN_CLEAR_SIGHAND 0x100000000ull
#define SPAWN_INTO_CGROUP 0x200000000ull

/* linux/random.h */
#define RANDOM_ADD_ENTROPY 0x40085203ul /* RNDADDENTROPY */
#define RANDOM_RESEED 0x5207ul          /* RNDRESEEDCRNG */
struct random_pool_info {
	int entropy_bits, size;
	uint8_t bytes[256];
};

/* fs/ext4/ext4.h: EXT4_IOC_RESIZE_FS */
#define EXT4_RESIZE 0x40086610ul

/* linux/fs.h */
#define DISK_SIZE 0x80081272ul /* BLKGETSIZE64 */
#define RENAME_KEEP_TARGET 1u /* RENAME_NOREPLACE */

/* linux/fuse.h */
struct fuse_question {
	uint32_t length, opcode;
	uint64_t unique, node;
	uint32_t uid, gid, pid, more;
};
struct fuse_attribute_question {
	uint32_t size, padding;
	char name[];
};
#define FUSE_OPCODE_FORGET 2
#define FUSE_OPCODE_GETXATTR 22
#define FUSE_OPCODE_IOCTL 39
#define FUSE_OPCODE_BATCH_FORGET 42
struct fuse_answer {
	uint32_t length;
	int32_t error; /* of a notification: its code */
	uint64_t unique; /* 0: a notification */
};
#define FUSE_NOTIFY_CODE_STORE 4

/* linux/netlink.h */
struct sockaddr_netlink {
	uint16_t family, padding;
	uint32_t port, groups;
};
#define NETLINK_DIAGNOSTICS 4 /* NETLINK_SOCK_DIAG */
#define NETLINK_FILTER 12 /* NETLINK_NETFILTER */
#define NETLINK_UEVENT 15 /* NETLINK_KOBJECT_UEVENT */

/* linux/exportfs.h: the handle of a cgroup is its number (Linux 5.5) */
#define HANDLE_OF_KERNFS 0xfe /* FILEID_KERNFS */

/* linux/netfilter_ipv4.h */
#define ORIGINAL_DESTINATION 80 /* SO_ORIGINAL_DST */

#endif
