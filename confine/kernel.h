/* Constants of the kernel's interface that a bare musl tool chain does not bring. Sources: include/uapi/linux/. */
#ifndef CONFINE_KERNEL_H
#define CONFINE_KERNEL_H

#include <stdint.h>

/* linux/landlock.h */
#define SYS_LANDLOCK_CREATE_RULESET 444
#define SYS_LANDLOCK_ADD_RULE 445
#define SYS_LANDLOCK_RESTRICT_SELF 446
#define LANDLOCK_CREATE_RULESET_VERSION 1u
#define LANDLOCK_RULE_PATH_BENEATH 1
#define LANDLOCK_FS_EXECUTE (1ull << 0)
#define LANDLOCK_FS_WRITE_FILE (1ull << 1)
#define LANDLOCK_FS_READ_FILE (1ull << 2)
#define LANDLOCK_FS_READ_DIR (1ull << 3)
#define LANDLOCK_FS_ABI1 ((1ull << 13) - 1) /* everything up to MAKE_SYM */
#define LANDLOCK_FS_REFER (1ull << 13)      /* ABI 2 */
#define LANDLOCK_FS_TRUNCATE (1ull << 14)   /* ABI 3 */
#define LANDLOCK_FS_IOCTL_DEV (1ull << 15)  /* ABI 5 */
#define LANDLOCK_NET_ALL 3ull               /* ABI 4: bind and connect TCP */
#define LANDLOCK_SCOPE_ALL 3ull             /* ABI 6: abstract Unix sockets, signals */

struct landlock_ruleset {
	uint64_t handled_fs;
	uint64_t handled_net;
	uint64_t scoped;
};

struct landlock_path_beneath {
	uint64_t allowed;
	int32_t parent_fd;
} __attribute__((packed));

/* linux/seccomp.h */
#define SECCOMP_SET_MODE_FILTER 1
#define SECCOMP_FILTER_FLAG_NEW_LISTENER (1u << 3)
#define SECCOMP_RET_KILL_PROCESS 0x80000000u
#define SECCOMP_RET_ERRNO 0x00050000u
#define SECCOMP_RET_USER_NOTIF 0x7fc00000u
#define SECCOMP_RET_ALLOW 0x7fff0000u
#define SECCOMP_USER_NOTIF_FLAG_CONTINUE 1u
#define SECCOMP_ADDFD_FLAG_SEND (1u << 1) /* Linux 5.14 */

struct seccomp_data {
	int nr;
	uint32_t arch;
	uint64_t instruction_pointer;
	uint64_t args[6];
};

struct seccomp_notif {
	uint64_t id;
	uint32_t pid;
	uint32_t flags;
	struct seccomp_data data;
};

struct seccomp_notif_resp {
	uint64_t id;
	int64_t val;
	int32_t error;
	uint32_t flags;
};

struct seccomp_notif_addfd {
	uint64_t id;
	uint32_t flags;
	uint32_t srcfd;
	uint32_t newfd;
	uint32_t newfd_flags;
};

#define SECCOMP_IOCTL_NOTIF_RECV 0xc0502100ul     /* SECCOMP_IOWR(0, struct seccomp_notif) */
#define SECCOMP_IOCTL_NOTIF_SEND 0xc0182101ul     /* SECCOMP_IOWR(1, struct seccomp_notif_resp) */
#define SECCOMP_IOCTL_NOTIF_ADDFD 0x40182103ul    /* SECCOMP_IOW(3, struct seccomp_notif_addfd) */

/* linux/filter.h, linux/bpf_common.h */
struct sock_filter {
	uint16_t code;
	uint8_t jt, jf;
	uint32_t k;
};

struct sock_fprog {
	uint16_t len;
	struct sock_filter *filter;
};

#define BPF_LOAD_WORD 0x20   /* BPF_LD | BPF_W | BPF_ABS */
#define BPF_JUMP_EQ 0x15     /* BPF_JMP | BPF_JEQ | BPF_K */
#define BPF_JUMP_GE 0x35     /* BPF_JMP | BPF_JGE | BPF_K */
#define BPF_AND 0x54         /* BPF_ALU | BPF_AND | BPF_K */
#define BPF_RETURN 0x06      /* BPF_RET | BPF_K */

/* linux/audit.h */
#define AUDIT_ARCH_X86_64 0xc000003eu
#define AUDIT_ARCH_AARCH64 0xc00000b7u

/* linux/capability.h, linux/securebits.h */
#define CAPABILITY_VERSION_3 0x20080522u
#define SECBITS_NO_ROOT 0xef /* NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE, and all four bits locked */

#endif
