/* taskvm-confine: run one program (QEMU) confined, and end it when its owner is gone.
 *
 *   taskvm-confine [--read PATH]… [--execute PATH]… [--write PATH]… [--copy-on-write PATH] [--file-size BYTES]
 *                  [--data-size BYTES] [--lifeline FD] [--report FD] -- PROGRAM [ARGUMENT]…
 *
 * The supervisor stays behind as the program's parent. It kills the program when the lifeline reaches end of file (the
 * owner closed it, or died in any way at all: PR_SET_PDEATHSIG alone would follow the thread that started us), and
 * exits as the program did: its code, or 128 + the signal.
 *
 * --copy-on-write PATH: the program will open PATH for reading and writing, as QEMU 7 does with a memory file it maps
 * privately. It is given a read-only descriptor instead, so that no process can ever write to a template's memory.
 * (seccomp_unotify(2). The decision is no security border: any other open goes on to Landlock, which refuses writing.)
 *
 * --report FD: one line of JSON about the confinement, before the program runs.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "jail.h"
#include "kernel.h"

enum { EXIT_USAGE = 125, EXIT_CONFINE = 126, EXIT_EXECUTE = 127 };

struct options {
	struct jail jail;
	int lifeline, report;
	char **program;
};

/* Arguments. */

static int add_path(const char **paths, int *count, const char *path)
{
	if (*count == MAX_PATHS)
		return -1;
	paths[(*count)++] = path;
	return 0;
}

static int take_option(struct options *options, const char *name, const char *value)
{
	struct jail *jail = &options->jail;
	if (!strcmp(name, "--read"))
		return add_path(jail->read, &jail->reads, value);
	if (!strcmp(name, "--execute"))
		return add_path(jail->execute, &jail->executes, value);
	if (!strcmp(name, "--write"))
		return add_path(jail->write, &jail->writes, value);
	if (!strcmp(name, "--copy-on-write"))
		return (jail->copy_on_write = value) ? add_path(jail->read, &jail->reads, value) : -1;
	if (!strcmp(name, "--file-size"))
		return (jail->file_size = strtoul(value, NULL, 10)) ? 0 : -1;
	if (!strcmp(name, "--data-size"))
		return (jail->data_size = strtoul(value, NULL, 10)) ? 0 : -1;
	if (!strcmp(name, "--lifeline"))
		return (options->lifeline = atoi(value)) > 2 ? 0 : -1;
	if (!strcmp(name, "--report"))
		return (options->report = atoi(value)) > 2 ? 0 : -1;
	return -1;
}

static int parse(struct options *options, int count, char **arguments)
{
	int i = 1;
	for (; i + 1 < count && strcmp(arguments[i], "--"); i += 2)
		if (take_option(options, arguments[i], arguments[i + 1]) < 0)
			return -1;
	if (i + 1 >= count)
		return -1;
	options->program = arguments + i + 1;
	return 0;
}

/* The program's side, between fork and execve. */

static int send_descriptor(int channel, int fd)
{
	char byte = 0, space[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec part = {&byte, 1};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
	if (fd > 0) {
		message.msg_control = space;
		message.msg_controllen = sizeof(space);
		struct cmsghdr *header = CMSG_FIRSTHDR(&message);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(header), &fd, sizeof(int));
	}
	return sendmsg(channel, &message, MSG_NOSIGNAL) == 1 ? 0 : fail("report to", "the supervisor");
}

static void say_report(int fd, const struct jail_report *report)
{
	if (fd > 0) {
		dprintf(fd, "{\"landlock\":%d,\"namespaces\":%s}\n", report->landlock, report->namespaces ? "true" : "false");
		close(fd);
	}
}

static void run_program(const struct options *options, struct jail_report *report, int channel)
{
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	if (options->lifeline > 0)
		close(options->lifeline);
	if (jail_limits(&options->jail) < 0 || jail_landlock(&options->jail, report) < 0 || jail_capabilities() < 0)
		_exit(EXIT_CONFINE);
	say_report(options->report, report);
	int listener = jail_seccomp(options->jail.copy_on_write != NULL);
	if (listener < 0 || send_descriptor(channel, listener) < 0)
		_exit(EXIT_CONFINE);
	if (listener > 0)
		close(listener);
	/* Last, because a change of credentials clears it; the answer proves that the supervisor was alive after it was set. */
	prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	char go;
	if (read(channel, &go, 1) != 1)
		_exit(EXIT_CONFINE);
	close(channel);
	execv(options->program[0], options->program);
	fail("execute", options->program[0]);
	_exit(EXIT_EXECUTE);
}

/* The supervisor's side. */

static int receive_descriptor(int channel)
{
	char byte, space[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec part = {&byte, 1};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof(space)};
	int fd = -1;
	if (recvmsg(channel, &message, MSG_CMSG_CLOEXEC) != 1)
		return -2;
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	if (header && header->cmsg_type == SCM_RIGHTS)
		memcpy(&fd, CMSG_DATA(header), sizeof(int));
	return fd;
}

static bool names_memory(const struct seccomp_notif *call, const char *path)
{
	char name[4096];
	struct iovec here = {name, sizeof(name)}, there = {(void *)(uintptr_t)call->data.args[1], sizeof(name)};
	size_t length = strlen(path) + 1;
	/* A short read at the end of a mapping is fine: the name is compared with its terminator. */
	there.iov_len = here.iov_len = length;
	ssize_t got = process_vm_readv((pid_t)call->pid, &here, 1, &there, 1, 0);
	return got == (ssize_t)length && memcmp(name, path, length) == 0;
}

static void answer_open(int listener, const char *path)
{
	struct seccomp_notif call = {0};
	if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &call) < 0)
		return;
	if (names_memory(&call, path)) {
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		struct seccomp_notif_addfd give = {.id = call.id, .flags = SECCOMP_ADDFD_FLAG_SEND, .srcfd = (uint32_t)fd,
						   .newfd_flags = O_CLOEXEC};
		bool given = fd >= 0 && ioctl(listener, SECCOMP_IOCTL_NOTIF_ADDFD, &give) >= 0;
		if (fd >= 0)
			close(fd);
		if (given)
			return;
	}
	struct seccomp_notif_resp go_on = {.id = call.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};
	ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &go_on);
}

static int exit_code(pid_t program, bool *ended)
{
	int status;
	*ended = waitpid(program, &status, WNOHANG) == program;
	if (!*ended)
		return 0;
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static int supervise(const struct options *options, pid_t program, int listener, int signals)
{
	struct pollfd watched[3] = {
		{.fd = signals, .events = POLLIN},
		{.fd = options->lifeline > 0 ? options->lifeline : -1, .events = POLLIN},
		{.fd = listener, .events = POLLIN},
	};
	for (;;) {
		bool ended;
		int code = exit_code(program, &ended);
		if (ended)
			return code;
		if (poll(watched, 3, -1) < 0 && errno != EINTR)
			break;
		struct signalfd_siginfo info;
		if (watched[0].revents && read(signals, &info, sizeof(info)) == sizeof(info) && info.ssi_signo != SIGCHLD)
			break;
		if (watched[1].revents)
			break; /* nothing is ever written to the lifeline */
		if (watched[2].revents & POLLIN)
			answer_open(listener, options->jail.copy_on_write);
		else if (watched[2].revents)
			watched[2].fd = -1;
	}
	kill(program, SIGKILL);
	waitpid(program, NULL, 0);
	return 128 + SIGKILL;
}

/* The supervisor needs nothing but the descriptors above: keep the program's from staying open after it has ended, or
 * the owner would not see the ports reach their end. */
static void keep_only(const int *keep, int count)
{
	for (int fd = 3; fd < 1024; fd++) {
		bool kept = false;
		for (int i = 0; i < count; i++)
			kept = kept || keep[i] == fd;
		if (!kept)
			close(fd);
	}
}

int main(int count, char **arguments)
{
	struct options options = {0};
	struct jail_report report = {0};
	int channel[2];
	sigset_t watched;

	if (parse(&options, count, arguments) < 0) {
		fprintf(stderr, "taskvm-confine: bad option; see the head of confine.c\n");
		return EXIT_USAGE;
	}
	sigemptyset(&watched);
	sigaddset(&watched, SIGCHLD);
	sigaddset(&watched, SIGTERM);
	sigaddset(&watched, SIGINT);
	sigaddset(&watched, SIGHUP);
	sigprocmask(SIG_BLOCK, &watched, NULL);
	int signals = signalfd(-1, &watched, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signals < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, channel) < 0) {
		fail("prepare", "the supervisor");
		return EXIT_CONFINE;
	}
	setsid(); /* a Ctrl-C at the owner's terminal is the owner's to handle */
	if (jail_namespaces(&report) < 0)
		return EXIT_CONFINE;
	pid_t program = fork(); /* the first process of the new process namespace */
	if (program < 0) {
		fail("fork", arguments[0]);
		return EXIT_CONFINE;
	}
	if (program == 0)
		run_program(&options, &report, channel[1]);
	close(channel[1]);
	int listener = receive_descriptor(channel[0]);
	if (options.report > 0)
		close(options.report);
	if (listener >= -1 && write(channel[0], "g", 1) == 1) {
		const int keep[] = {signals, options.lifeline, listener};
		keep_only(keep, 3);
	}
	return supervise(&options, program, listener, signals);
}
