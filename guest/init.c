/* taskvm-guest: PID 1 of a taskvm guest, and the host's agent in it for as long as it runs.
 *
 * A code tour: boot.c finds the disk and the ports; cgroup.c and netlink.c prepare the ground; then three threads serve one port each:
 * control.c (exec.c, spawn.c; transfer.c with files.c, identity.c beside it), fusepump.c and egress.c. Below them port.c moves frames
 * (frames.c, msgpack.c), loop.c waits, pool.c keeps what may block out of the way.
 *
 * Rule 1: PID 1 never exits. What cannot go on says why and turns the machine off.
 * Rule 2: the control thread never waits for a file system: FUSE is served by this same process.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "boot.h"
#include "cgroup.h"
#include "control.h"
#include "egress.h"
#include "fusepump.h"
#include "log.h"
#include "netlink.h"

enum { CONSOLE_LEVEL = 8, SHOW_ERRORS = 4 }; /* syslog(2): SYSLOG_ACTION_CONSOLE_LEVEL; below KERN_WARNING */

/* Descriptors 0 to 2 are always open, so that no pipe ever gets their numbers. */
static void open_console(void)
{
	int fd = open("/dev/console", O_RDWR | O_NOCTTY);
	if (fd < 0)
		return;
	for (int i = 0; i < 3; i++)
		if (fd != i)
			dup2(fd, i);
	if (fd > 2)
		close(fd);
}

static void protect_agent(void)
{
	const struct rlimit files = {1048576, 1048576}; /* fs.nr_open; what programs get is set when they start */
	prctl(PR_SET_DUMPABLE, 0); /* a program that is being started shares this memory, already under the user's number */
	if (setrlimit(RLIMIT_NOFILE, &files) < 0)
		say("raise the limit of open files: %s", strerror(errno));
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, "-1000", 5) < 0)
		say("write oom_score_adj: %s", strerror(errno));
	if (fd >= 0)
		close(fd);
}

int main(void)
{
	struct boot_ports ports;
	struct utsname kernel;
	sigset_t all;
	open_console();
	if (getpid() != 1) {
		say("this program is the init process of a taskvm guest and nothing else");
		return EXIT_FAILURE;
	}
	umask(0);
	setsid();
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL); /* before the first thread: each inherits it; SIGCHLD comes by signalfd */
	boot(&ports);
	klogctl(CONSOLE_LEVEL, NULL, SHOW_ERRORS);
	protect_agent();
	cgroup_init();
	network_init();
	fusepump_start(ports.fs);
	egress_start(ports.net);
	uname(&kernel);
	control_run(ports.control, kernel.release);
}
