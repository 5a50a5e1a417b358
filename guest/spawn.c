/* clone3 with CLONE_VM | CLONE_VFORK | CLONE_INTO_CGROUP: no page tables are copied, no cgroup migration takes the kernel's
 * global lock, and the thread that spawns knows the outcome of execve when clone3 returns.
 *
 * It runs in a pool's thread, because chdir and execve may wait for a FUSE mount that this very process serves. The child shares
 * the agent's memory until execve: it makes raw system calls only (libc's setuid family would signal the agent's threads), and
 * CLONE_VFORK also keeps the kernel from spreading the child's oom_score_adj to the agent (fs/proc/base.c, __set_oom_adj).
 */
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "accounting.h"
#include "cgroup.h"
#include "kernel.h"
#include "pty.h"

enum { MAX_GROUPS = 64, CHILD_STACK = 32 * 1024 };

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

enum { STRINGS_ROOM = 16 * 1024 };

/* What the child reads and, where it fails, writes. */
struct child {
	char **argv, **env, cwd[PATH_MAX];
	uint32_t uid, gid, groups[MAX_GROUPS];
	size_t group_count;
	int in, out, err;
	bool tty;
	struct failure failure;
	size_t used; /* of `room`, for the strings of most programs; those of others come from the heap */
	_Alignas(16) char room[STRINGS_ROOM];
	_Alignas(16) char stack[CHILD_STACK];
};

/* One is kept for the next program. From the heap, which libc maps and unmaps for so much memory, it was a tenth of all the code
 * that a fork runs until its first command has answered; and without KVM each piece of that is translated anew. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct child *kept;

static struct child *take_child(void)
{
	pthread_mutex_lock(&lock);
	struct child *child = kept;
	kept = NULL;
	pthread_mutex_unlock(&lock);
	return child ? child : malloc(sizeof(*child));
}

static void *take_room(struct child *child, size_t size)
{
	const size_t place = (child->used + _Alignof(max_align_t) - 1) & ~(_Alignof(max_align_t) - 1);
	if (size > sizeof(child->room) || place > sizeof(child->room) - size)
		return malloc(size);
	child->used = place + size;
	return child->room + place;
}

static void free_room(struct child *child, char **strings)
{
	const uintptr_t place = (uintptr_t)strings, room = (uintptr_t)child->room;
	if (place < room || place >= room + sizeof(child->room))
		free(strings);
}

static void keep_child(struct child *child)
{
	free_room(child, child->argv);
	free_room(child, child->env);
	pthread_mutex_lock(&lock);
	struct child *other = kept;
	kept = child;
	pthread_mutex_unlock(&lock);
	free(other);
}

/* Arguments. */

/* An array of byte strings as one block: the pointers, NULL, and the strings behind. */
static char **copy_strings(const struct request *request, const char *key, struct child *child, struct failure *failure)
{
	struct msgpack_value list, item;
	if (!request_find(request, key, &list) || list.type != MSGPACK_ARRAY) {
		fail_call(failure, EINVAL, key);
		return NULL;
	}
	/* Each string takes at least its tag in the map, so the map's length bounds text and terminators. */
	char **strings = take_room(child, (list.length + 1) * sizeof(char *) + request->length);
	if (!strings) {
		fail_call(failure, ENOMEM, key);
		return NULL;
	}
	char *text = (char *)(strings + list.length + 1);
	struct msgpack_reader reader = {list.bytes, request->map + request->length};
	for (size_t i = 0; i < list.length; i++) {
		if (!msgpack_read_whole(&reader, &item) || item.type != MSGPACK_BYTES || memchr(item.bytes, 0, item.length)) {
			fail_call(failure, EINVAL, key);
			free_room(child, strings);
			return NULL;
		}
		strings[i] = text;
		memcpy(text, item.bytes, item.length);
		text += item.length;
		*text++ = 0;
	}
	strings[list.length] = NULL;
	return strings;
}

static bool read_number(const struct msgpack_value *value, uint32_t *number)
{
	/* (uid_t)-1 means "leave it" to setresuid: a request for it would keep root. */
	if (value->type != MSGPACK_INTEGER || value->integer < 0 || value->integer >= UINT32_MAX)
		return false;
	*number = (uint32_t)value->integer;
	return true;
}

static bool read_identity(const struct request *request, struct child *child, struct failure *failure)
{
	struct msgpack_value value;
	if (!request_find(request, "uid", &value) || !read_number(&value, &child->uid))
		return fail_call(failure, EINVAL, "uid");
	if (!request_find(request, "gid", &value) || !read_number(&value, &child->gid))
		return fail_call(failure, EINVAL, "gid");
	if (!request_find(request, "groups", &value))
		return true;
	if (value.type != MSGPACK_ARRAY || value.length > MAX_GROUPS)
		return fail_call(failure, EINVAL, "groups");
	struct msgpack_reader reader = {value.bytes, request->map + request->length};
	child->group_count = value.length;
	for (size_t i = 0; i < child->group_count; i++)
		if (!msgpack_read_whole(&reader, &value) || !read_number(&value, &child->groups[i]))
			return fail_call(failure, EINVAL, "groups");
	return true;
}

static bool read_program(const struct request *request, struct child *child, struct failure *failure)
{
	if (!request_path(request, "cwd", child->cwd, failure) || !read_identity(request, child, failure))
		return false;
	child->argv = copy_strings(request, "argv", child, failure);
	if (!child->argv)
		return false;
	if (!child->argv[0] || !child->argv[0][0])
		return fail_call(failure, EINVAL, "argv");
	child->env = copy_strings(request, "env", child, failure);
	return child->env != NULL;
}

/* The child's side. */

static const char *search_path(char *const *env)
{
	for (; *env; env++)
		if (!strncmp(*env, "PATH=", 5))
			return *env + 5;
	return DEFAULT_PATH;
}

/* As execvp does, but in the PATH that the program will have: the last EACCES outlives later ENOENTs. */
static int execute(const struct child *child)
{
	const char *name = child->argv[0];
	if (strchr(name, '/')) {
		execve(name, child->argv, child->env);
		return errno;
	}
	char path[PATH_MAX];
	int error = ENOENT;
	size_t name_length = strlen(name);
	const char *end;
	for (const char *start = search_path(child->env);; start = end + 1) {
		end = strchr(start, ':');
		end = end ? end : start + strlen(start);
		size_t length = (size_t)(end - start);
		if (length + name_length + 2 <= sizeof(path)) {
			memcpy(path, start, length);
			path[length] = '/';
			memcpy(path + length + (length > 0), name, name_length + 1);
			execve(path, child->argv, child->env);
			if (errno == EACCES)
				error = EACCES;
			else if (errno != ENOENT && errno != ENOTDIR)
				return errno;
		}
		if (!*end)
			return error;
	}
}

static void reset_oom_score(void)
{
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		ssize_t written = write(fd, "0", 1);
		(void)written; /* a guest without /proc, or a program that the kernel spares: neither ends the exec */
		close(fd);
	}
}

static bool become(const struct child *child, struct failure *failure)
{
	static const struct rlimit FILES = {1024, 524288}; /* as systemd: select() works, and a server can raise it */
	const uint64_t no_signals = 0;
	setsid();
	if (dup2(child->in, 0) < 0 || dup2(child->out, 1) < 0 || dup2(child->err, 2) < 0)
		return fail_call(failure, errno, "dup2");
	if (child->tty && ioctl(0, TIOCSCTTY, 0) < 0)
		return fail_call(failure, errno, "TIOCSCTTY");
	if (syscall(SYSCALL_CLOSE_RANGE, 3, ~0u, 0) < 0)
		return fail_call(failure, errno, "close_range");
	reset_oom_score();
	umask(022); /* the agent's is 0, so that modes are those that were asked for */
	syscall(SYS_prlimit64, 0, RLIMIT_NOFILE, &FILES, NULL);
	if (syscall(SYS_setgroups, child->group_count, child->groups) < 0)
		return fail_call(failure, errno, "setgroups");
	if (syscall(SYS_setresgid, child->gid, child->gid, child->gid) < 0)
		return fail_call(failure, errno, "setresgid");
	if (syscall(SYS_setresuid, child->uid, child->uid, child->uid) < 0)
		return fail_call(failure, errno, "setresuid");
	if (chdir(child->cwd) < 0)
		return fail_call(failure, errno, "chdir");
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &no_signals, NULL, sizeof(no_signals));
	return true;
}

static _Noreturn void child_main(void *argument)
{
	struct child *child = argument;
	if (become(child, &child->failure))
		fail_call(&child->failure, execute(child), "execve");
	for (;;)
		syscall(SYS_exit_group, 127);
}

/* The child must not return into the frame that the parent still needs, so it gets a stack and a first function. */
static long clone_onto(struct spawn_args *args, void (*run)(void *), void *argument)
{
#if defined(__x86_64__)
	long result;
	register void (*function)(void *) __asm__("r8") = run;
	register void *value __asm__("r9") = argument;
	__asm__ volatile("syscall\n\ttest %%rax, %%rax\n\tjnz 1f\n\t"
			 "xor %%ebp, %%ebp\n\tmov %%r9, %%rdi\n\tcall *%%r8\n\thlt\n1:"
			 : "=a"(result)
			 : "0"((long)SYSCALL_CLONE3), "D"(args), "S"(sizeof(*args)), "r"(function), "r"(value)
			 : "rcx", "r11", "memory");
#elif defined(__aarch64__)
	register long result __asm__("x0") = (long)args;
	register long size __asm__("x1") = sizeof(*args);
	register void (*function)(void *) __asm__("x2") = run;
	register void *value __asm__("x3") = argument;
	register long number __asm__("x8") = SYSCALL_CLONE3;
	__asm__ volatile("svc 0\n\tcbnz x0, 1f\n\tmov x29, xzr\n\tmov x0, x3\n\tblr x2\n\tbrk 1\n1:"
			 : "+r"(result)
			 : "r"(size), "r"(function), "r"(value), "r"(number)
			 : "memory", "cc");
#else
#error "taskvm-guest knows x86-64 and aarch64"
#endif
	return result;
}

/* The agent's side. */

static bool start(struct spawn *spawn, struct child *child)
{
	struct spawn_args args = {
		.flags = SPAWN_VM | SPAWN_VFORK | SPAWN_PARENT_SETTID | SPAWN_CLEAR_SIGHAND | SPAWN_INTO_CGROUP,
		.parent_tid = (uintptr_t)&spawn->pid,
		.exit_signal = SIGCHLD,
		.stack = (uintptr_t)child->stack,
		.stack_size = sizeof(child->stack),
		.cgroup = (uint64_t)spawn->cgroup,
	};
	long pid = clone_onto(&args, child_main, child);
	if (pid < 0)
		return fail_call(&spawn->failure, (int)-pid, "clone3");
	if (!child->failure.call)
		return true;
	/* Gone from its cgroup before that is removed; the control thread may have reaped it first (ECHILD). */
	waitpid((pid_t)pid, NULL, 0);
	spawn->failure = child->failure;
	return false;
}

static void close_all(int *const *descriptors, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (*descriptors[i] >= 0) {
			close(*descriptors[i]);
			*descriptors[i] = -1;
		}
}

/* One pipe: the agent's end never blocks, the program's does. */
static bool make_pipe(int *reader, int *writer, int *const ours, struct failure *failure)
{
	int ends[2];
	if (pipe2(ends, O_CLOEXEC) < 0)
		return fail_call(failure, errno, "pipe2");
	*reader = ends[0];
	*writer = ends[1];
	fcntl(*ours, F_SETFL, O_NONBLOCK);
	return true;
}

static bool copy_descriptor(int from, int *to, struct failure *failure)
{
	*to = fcntl(from, F_DUPFD_CLOEXEC, 3);
	return *to >= 0 || fail_call(failure, errno, "fcntl");
}

static bool connect_pipes(struct spawn *spawn, struct child *child, bool merge)
{
	if (!make_pipe(&child->in, &spawn->in, &spawn->in, &spawn->failure) ||
	    !make_pipe(&spawn->out, &child->out, &spawn->out, &spawn->failure))
		return false;
	if (!merge)
		return make_pipe(&spawn->err, &child->err, &spawn->err, &spawn->failure);
	return copy_descriptor(child->out, &child->err, &spawn->failure);
}

static bool connect_terminal(struct spawn *spawn, struct child *child, const uint8_t *map, size_t length)
{
	struct winsize size;
	if (!pty_read_size(map, length, &size))
		return fail_call(&spawn->failure, EINVAL, "pty");
	spawn->tty = child->tty = true;
	return pty_open(&spawn->out, &child->in, &size, child->uid, &spawn->failure) &&
	       copy_descriptor(spawn->out, &spawn->in, &spawn->failure) &&
	       copy_descriptor(child->in, &child->out, &spawn->failure) &&
	       copy_descriptor(child->in, &child->err, &spawn->failure);
}

static bool connect(struct spawn *spawn, struct child *child)
{
	size_t length;
	const uint8_t *terminal = request_map(spawn->request, "pty", &length);
	if (terminal)
		return connect_terminal(spawn, child, terminal, length);
	return connect_pipes(spawn, child, request_flag(spawn->request, "merge", false));
}

static bool run(struct spawn *spawn, struct child *child)
{
	const struct request *request = spawn->request;
	if (!read_program(request, child, &spawn->failure) || !connect(spawn, child))
		return false;
	spawn->cgroup = cgroup_make(request->stream);
	if (spawn->cgroup < 0)
		return fail_call(&spawn->failure, errno, "mkdir of a cgroup");
	return accounting_limit(spawn->cgroup, request, &spawn->failure) && start(spawn, child);
}

static void run_job(struct job *job)
{
	struct spawn *spawn = container_of(job, struct spawn, job);
	struct child *child = take_child();
	if (!child) {
		fail_call(&spawn->failure, ENOMEM, "malloc");
		return;
	}
	memset(child, 0, offsetof(struct child, room));
	child->in = child->out = child->err = -1;
	if (!run(spawn, child)) {
		close_all((int *const[]){&spawn->in, &spawn->out, &spawn->err}, 3);
		if (spawn->cgroup >= 0)
			cgroup_remove(spawn->request->stream);
		close_all((int *const[]){&spawn->cgroup}, 1);
	}
	close_all((int *const[]){&child->in, &child->out, &child->err}, 3);
	keep_child(child);
}

void spawn_init(struct spawn *spawn, struct request *request)
{
	*spawn = (struct spawn){.request = request, .in = -1, .out = -1, .err = -1, .cgroup = -1};
	spawn->job.run = run_job;
}

void spawn_free(struct spawn *spawn)
{
	free(spawn->request);
}
