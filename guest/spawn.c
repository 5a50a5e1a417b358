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
#include "program.h"
#include "pty.h"

enum { CHILD_STACK = 32 * 1024 };

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

/* What the child reads and, where it fails, writes. */
struct child {
	int in, out, err;
	bool tty;
	struct failure failure;
	struct program program;
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

static void keep_child(struct child *child)
{
	program_free(&child->program);
	pthread_mutex_lock(&lock);
	struct child *other = kept;
	kept = child;
	pthread_mutex_unlock(&lock);
	free(other);
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
static int execute(const struct program *program)
{
	const char *name = program->argv[0];
	if (strchr(name, '/')) {
		execve(name, program->argv, program->env);
		return errno;
	}
	char path[PATH_MAX];
	int error = ENOENT;
	size_t name_length = strlen(name);
	const char *end;
	for (const char *start = search_path(program->env);; start = end + 1) {
		end = strchr(start, ':');
		end = end ? end : start + strlen(start);
		size_t length = (size_t)(end - start);
		if (length + name_length + 2 <= sizeof(path)) {
			memcpy(path, start, length);
			path[length] = '/';
			memcpy(path + length + (length > 0), name, name_length + 1);
			execve(path, program->argv, program->env);
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
	const struct program *program = &child->program;
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
	if (syscall(SYS_setgroups, program->group_count, program->groups) < 0)
		return fail_call(failure, errno, "setgroups");
	if (syscall(SYS_setresgid, program->gid, program->gid, program->gid) < 0)
		return fail_call(failure, errno, "setresgid");
	if (syscall(SYS_setresuid, program->uid, program->uid, program->uid) < 0)
		return fail_call(failure, errno, "setresuid");
	if (chdir(program->cwd) < 0)
		return fail_call(failure, errno, "chdir");
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &no_signals, NULL, sizeof(no_signals));
	return true;
}

static _Noreturn void child_main(void *argument)
{
	struct child *child = argument;
	if (become(child, &child->failure))
		fail_call(&child->failure, execute(&child->program), "execve");
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
	return pty_open(&spawn->out, &child->in, &size, child->program.uid, &spawn->failure) &&
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
	if (!program_read(&child->program, request, &spawn->failure) || !connect(spawn, child))
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
	memset(child, 0, offsetof(struct child, program));
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
