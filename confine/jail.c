/* The steps that confine a program before it is executed: namespaces, limits, Landlock, capabilities, seccomp.
 *
 * QEMU is the wall between the guest and the host, and under TCG a thin one (QEMU's own documentation calls only KVM
 * guests a security boundary). So the process is left with what it needs: descriptors it was given, its run
 * directory, its images, and no way to get more.
 *
 * Order matters: namespaces need capabilities, Landlock needs the file system still in view, the seccomp filter
 * forbids what the steps before it use.
 */
#include "jail.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernel.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

int fail(const char *operation, const char *operand)
{
	fprintf(stderr, "taskvm-confine: %s %s: %s\n", operation, operand, strerror(errno));
	return -1;
}

static int write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t done = write(fd, text, strlen(text));
	close(fd);
	return done == (ssize_t)strlen(text) ? 0 : -1;
}

/* An empty network (not even loopback is up), no view of other processes, no System V objects. The user namespace
 * comes first so that an ordinary user may make the others; the caller's numbers stay what they are. */
int jail_namespaces(struct jail_report *report)
{
	char map[64];
	const int others = CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWPID;
	unsigned uid = getuid(), gid = getgid();

	if (unshare(CLONE_NEWUSER | others) == 0) {
		snprintf(map, sizeof(map), "%u %u 1", uid, uid);
		bool mapped = write_file("/proc/self/uid_map", map) == 0;
		snprintf(map, sizeof(map), "%u %u 1", gid, gid);
		mapped = mapped && write_file("/proc/self/setgroups", "deny") == 0 && write_file("/proc/self/gid_map", map) == 0;
		if (!mapped)
			return fail("map the user into", "its namespace");
		report->namespaces = true;
		return 0;
	}
	report->namespaces = uid == 0 && unshare(others) == 0;
	return 0;
}

int jail_limits(const struct jail *jail)
{
	struct rlimit none = {0, 0}, files = {1024, 1024}, size = {jail->file_size, jail->file_size};
	struct rlimit data = {jail->data_size, jail->data_size};

	if (setrlimit(RLIMIT_CORE, &none) < 0 || setrlimit(RLIMIT_NOFILE, &files) < 0)
		return fail("set", "resource limits");
	if (jail->file_size && setrlimit(RLIMIT_FSIZE, &size) < 0)
		return fail("set", "the file size limit");
	if (jail->data_size && setrlimit(RLIMIT_DATA, &data) < 0)
		return fail("set", "the data size limit");
	/* QEMU asks for huge pages for its translated code: in 16 regions, a few MB of each sandbox's memory for nothing. */
	prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		return fail("set", "no_new_privs");
	return 0;
}

/* Landlock (Documentation/userspace-api/landlock.rst). */

static uint64_t rights_known(int abi)
{
	uint64_t rights = LANDLOCK_FS_ABI1;
	if (abi >= 2)
		rights |= LANDLOCK_FS_REFER;
	if (abi >= 3)
		rights |= LANDLOCK_FS_TRUNCATE;
	if (abi >= 5)
		rights |= LANDLOCK_FS_IOCTL_DEV;
	return rights;
}

static int allow(int ruleset, const char *path, uint64_t rights)
{
	struct landlock_path_beneath rule = {.allowed = rights, .parent_fd = open(path, O_PATH | O_CLOEXEC)};
	struct stat status;

	if (rule.parent_fd < 0)
		return errno == ENOENT ? 0 : fail("open", path); /* a path that is not there needs no right */
	if (fstat(rule.parent_fd, &status) == 0 && !S_ISDIR(status.st_mode))
		rule.allowed &= LANDLOCK_FS_EXECUTE | LANDLOCK_FS_WRITE_FILE | LANDLOCK_FS_READ_FILE | LANDLOCK_FS_TRUNCATE |
				LANDLOCK_FS_IOCTL_DEV;
	int failed = syscall(SYS_LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, &rule, 0) < 0;
	if (failed)
		fail("allow", path);
	close(rule.parent_fd);
	return failed ? -1 : 0;
}

static int allow_all(int ruleset, const char *const *paths, int count, uint64_t rights)
{
	for (int i = 0; i < count; i++)
		if (allow(ruleset, paths[i], rights) < 0)
			return -1;
	return 0;
}

int jail_landlock(const struct jail *jail, struct jail_report *report)
{
	int abi = syscall(SYS_LANDLOCK_CREATE_RULESET, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
	if (abi < 1)
		return fail("use", "Landlock (Linux 5.13 with landlock among the active security modules is needed)");

	uint64_t known = rights_known(abi);
	struct landlock_ruleset rules = {.handled_fs = known};
	size_t size = offsetof(struct landlock_ruleset, handled_net);
	if (abi >= 4) {
		rules.handled_net = LANDLOCK_NET_ALL;
		size = offsetof(struct landlock_ruleset, scoped);
	}
	if (abi >= 6) {
		rules.scoped = LANDLOCK_SCOPE_ALL;
		size = sizeof(rules);
	}
	int ruleset = syscall(SYS_LANDLOCK_CREATE_RULESET, &rules, size, 0);
	if (ruleset < 0)
		return fail("create", "a Landlock ruleset");

	uint64_t read = LANDLOCK_FS_READ_FILE | LANDLOCK_FS_READ_DIR;
	uint64_t no_execute = known & ~LANDLOCK_FS_EXECUTE;
	if (allow_all(ruleset, jail->read, jail->reads, read) < 0 ||
	    allow_all(ruleset, jail->execute, jail->executes, read | LANDLOCK_FS_EXECUTE) < 0 ||
	    allow_all(ruleset, jail->write, jail->writes, no_execute) < 0)
		return -1;
	if (syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0) < 0)
		return fail("enter", "the Landlock ruleset");
	close(ruleset);
	report->landlock = abi;
	return 0;
}

/* A root user keeps its number but none of its powers: capabilities are not regained at execve. An ordinary user without
 * a user namespace has none to lose, and may not set the bits. */
int jail_capabilities(void)
{
	struct {
		uint32_t version;
		int32_t pid;
	} header = {CAPABILITY_VERSION_3, 0};
	struct {
		uint32_t effective, permitted, inheritable;
	} none[2] = {{0, 0, 0}, {0, 0, 0}};

	if (prctl(PR_SET_SECUREBITS, SECBITS_NO_ROOT, 0, 0, 0) < 0 && errno != EPERM)
		return fail("set", "the secure bits");
	if (syscall(SYS_capset, &header, none) < 0)
		return fail("drop", "capabilities");
	return 0;
}

/* Everything QEMU needs reaches it as an inherited descriptor, so it needs no way to make a socket; -sandbox spawn=deny
 * forbids processes. What is left out here is what would get around the other walls. */
static const int denied[] = {
	SYS_socket, SYS_connect, SYS_bind, SYS_listen, SYS_accept, SYS_accept4,
	425 /* io_uring_setup: its operations are not seen by this filter */,
	SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, 438 /* pidfd_getfd */,
	SYS_bpf, SYS_perf_event_open, SYS_userfaultfd, SYS_keyctl, SYS_add_key, SYS_request_key,
	SYS_unshare, SYS_setns, SYS_mount, SYS_umount2, SYS_pivot_root, SYS_chroot,
	428 /* open_tree */, 429 /* move_mount */, 430 /* fsopen */,
	SYS_open_by_handle_at, SYS_name_to_handle_at,
	SYS_kexec_load, SYS_init_module, SYS_finit_module, SYS_delete_module,
	/* Landlock says nothing about the attributes of a file (landlock.rst, Current limitations): the owner, who runs this
	 * program, could open his keys to other users, and root /etc/shadow. Descriptors too: images are open read-only. */
#ifdef SYS_chmod /* the older calls; later architectures have only those with `at` */
	SYS_chmod, SYS_chown, SYS_lchown, SYS_utime, SYS_utimes, SYS_futimesat,
#endif
	SYS_fchmod, SYS_fchmodat, 452 /* fchmodat2 */, SYS_fchown, SYS_fchownat, SYS_utimensat,
	SYS_setxattr, SYS_lsetxattr, SYS_fsetxattr, SYS_removexattr, SYS_lremovexattr, SYS_fremovexattr,
	463 /* setxattrat */, 466 /* removexattrat */, 469 /* file_setattr */,
	/* Nor does it keep one from being told what happens in a directory that cannot be listed. */
	SYS_inotify_add_watch, SYS_fanotify_init, SYS_fanotify_mark,
};

#define OFFSET(field) ((uint32_t)offsetof(struct seccomp_data, field))

int jail_seccomp(bool notify)
{
	struct sock_filter code[COUNT(denied) + 16];
	uint16_t n = 0;
#ifdef __x86_64__
	const uint32_t arch = AUDIT_ARCH_X86_64;
#else
	const uint32_t arch = AUDIT_ARCH_AARCH64;
#endif
	const struct sock_filter refuse = {BPF_RETURN, 0, 0, SECCOMP_RET_ERRNO | EPERM};
	const struct sock_filter allow_call = {BPF_RETURN, 0, 0, SECCOMP_RET_ALLOW};

	code[n++] = (struct sock_filter){BPF_LOAD_WORD, 0, 0, OFFSET(arch)};
	code[n++] = (struct sock_filter){BPF_JUMP_EQ, 1, 0, arch};
	code[n++] = (struct sock_filter){BPF_RETURN, 0, 0, SECCOMP_RET_KILL_PROCESS};
	code[n++] = (struct sock_filter){BPF_LOAD_WORD, 0, 0, OFFSET(nr)};
#ifdef __x86_64__
	code[n++] = (struct sock_filter){BPF_JUMP_GE, 0, 1, 0x40000000}; /* the x32 numbers of the same calls */
	code[n++] = refuse;
#endif
	/* Jumps count from the next instruction. Behind the list stand: the test for openat, ALLOW, the refusal. */
	for (size_t i = 0; i < COUNT(denied); i++)
		code[n++] = (struct sock_filter){BPF_JUMP_EQ, (uint8_t)(COUNT(denied) - 1 - i + 2), 0, (uint32_t)denied[i]};
	code[n++] = (struct sock_filter){BPF_JUMP_EQ, (uint8_t)(notify ? 2 : 0), 0, SYS_openat};
	code[n++] = allow_call;
	code[n++] = refuse;
	/* openat: only one that asks for reading and writing is worth the supervisor's time. */
	code[n++] = (struct sock_filter){BPF_LOAD_WORD, 0, 0, OFFSET(args[2])};
	code[n++] = (struct sock_filter){BPF_AND, 0, 0, O_ACCMODE};
	code[n++] = (struct sock_filter){BPF_JUMP_EQ, 1, 0, O_RDWR};
	code[n++] = allow_call;
	code[n++] = (struct sock_filter){BPF_RETURN, 0, 0, SECCOMP_RET_USER_NOTIF};

	struct sock_fprog program = {n, code};
	int fd = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, notify ? SECCOMP_FILTER_FLAG_NEW_LISTENER : 0, &program);
	if (fd < 0)
		return fail("install", "the seccomp filter");
	return fd;
}
