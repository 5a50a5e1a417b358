/* The cgroups of the execs. Every path is relative to a descriptor opened at the start: what the guest mounts or unmounts later
 * does not matter. */
#include "cgroup.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernel.h"
#include "log.h"

#define ROOT "/sys/fs/cgroup"
/* What the guest may nest below an exec (a container engine nests three or four); deeper leaves stay until the end. */
enum { MAX_NESTING = 16 };

enum {
	MAX_PROCESSES = 32768, /* kernel.pid_max of a small machine */
	AGENT_THREADS = 256,   /* pools, mounts, ports, and the kernel's own threads */
};

/* A leaf has a number of its own as its name, so that one can lie ready for whichever exec comes first. */
struct leaf {
	uint32_t name, stream;
	struct leaf *next;
};

static int execs = -1;
/* Execs start in threads of a pool, end in the control thread, and are asked for by the egress thread. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct leaf *used, *spare;
static uint32_t last_name;

bool cgroup_write(int group, const char *file, const char *text)
{
	int fd = openat(group, file, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	bool written = write(fd, text, strlen(text)) >= 0;
	int error = errno;
	close(fd);
	errno = error;
	return written;
}

void cgroup_read(int group, const char *file, char *text, size_t size)
{
	int fd = openat(group, file, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, text, size - 1);
	text[length > 0 ? length : 0] = 0;
	if (fd >= 0)
		close(fd);
}

static void enable_controllers(const char *path)
{
	static const char *const CONTROLLERS[] = {"+cpu", "+memory", "+io", "+pids"};
	for (size_t i = 0; i < sizeof(CONTROLLERS) / sizeof(CONTROLLERS[0]); i++)
		if (!cgroup_write(AT_FDCWD, path, CONTROLLERS[i]))
			say("enable %s in %s: %s", CONTROLLERS[i], path, strerror(errno));
}

/* The agent can always start a thread, whatever forks in an exec. */
static void limit_processes(void)
{
	char text[16] = "";
	int fd = open("/proc/sys/kernel/threads-max", O_RDONLY | O_CLOEXEC);
	if (fd < 0 || read(fd, text, sizeof(text) - 1) <= 0)
		say("read threads-max: %s", strerror(errno));
	if (fd >= 0)
		close(fd);
	int limit = atoi(text);
	limit = (limit > 0 && limit < MAX_PROCESSES ? limit : MAX_PROCESSES) - AGENT_THREADS;
	snprintf(text, sizeof(text), "%d", limit);
	if (!cgroup_write(AT_FDCWD, ROOT "/exec/pids.max", text))
		say("write %s to %s/exec/pids.max: %s", text, ROOT, strerror(errno));
}

void cgroup_init(void)
{
	if (mount("cgroup2", ROOT, "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
		fatal("mount cgroup2 on %s: %s", ROOT, strerror(errno));
	if (mkdir(ROOT "/agent", 0755) < 0 || mkdir(ROOT "/exec", 0755) < 0)
		fatal("make the cgroups agent and exec: %s", strerror(errno));
	if (!cgroup_write(AT_FDCWD, ROOT "/agent/cgroup.procs", "0"))
		fatal("enter the cgroup agent: %s", strerror(errno));
	enable_controllers(ROOT "/cgroup.subtree_control");
	enable_controllers(ROOT "/exec/cgroup.subtree_control");
	limit_processes();
	execs = open(ROOT "/exec", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (execs < 0)
		fatal("open %s/exec: %s", ROOT, strerror(errno));
}

static void leaf_path(char path[16], uint32_t name)
{
	snprintf(path, 16, "%u", name);
}

static struct leaf *make_leaf(void)
{
	char path[16];
	struct leaf *leaf = calloc(1, sizeof(*leaf));
	if (!leaf)
		return NULL;
	pthread_mutex_lock(&lock);
	leaf->name = ++last_name;
	pthread_mutex_unlock(&lock);
	leaf_path(path, leaf->name);
	if (mkdirat(execs, path, 0755) < 0) {
		int error = errno;
		free(leaf);
		errno = error;
		return NULL;
	}
	return leaf;
}

static struct leaf *swap_spare(struct leaf *new)
{
	pthread_mutex_lock(&lock);
	struct leaf *old = spare;
	spare = new;
	pthread_mutex_unlock(&lock);
	return old;
}

/* Called by the control thread alone; meanwhile others may take it. */
void cgroup_prepare(void)
{
	struct leaf *leaf = swap_spare(NULL);
	swap_spare(leaf ? leaf : make_leaf());
}

int cgroup_make(uint32_t stream)
{
	char path[16];
	struct leaf *leaf = swap_spare(NULL);
	if (!leaf)
		leaf = make_leaf();
	if (!leaf)
		return -1;
	leaf->stream = stream;
	leaf_path(path, leaf->name);
	pthread_mutex_lock(&lock);
	leaf->next = used;
	used = leaf;
	pthread_mutex_unlock(&lock);
	int group = openat(execs, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (group < 0) {
		int error = errno;
		cgroup_remove(stream);
		errno = error;
	}
	return group;
}

/* The link to the first used leaf whose stream, or else whose name, is this one. Call it with the lock. */
static struct leaf **find_used(uint32_t stream, uint32_t name)
{
	struct leaf **link = &used;
	while (*link && (stream ? (*link)->stream != stream : (*link)->name != name))
		link = &(*link)->next;
	return link;
}

uint32_t cgroup_owner(uint64_t id)
{
	static const char ABOVE[] = ROOT "/exec/";
	union {
		struct file_handle handle;
		uint8_t bytes[sizeof(struct file_handle) + sizeof(id)];
	} name = {.handle = {.handle_bytes = sizeof(id), .handle_type = HANDLE_OF_KERNFS}};
	memcpy(name.bytes + sizeof(struct file_handle), &id, sizeof(id));
	int group = open_by_handle_at(execs, &name.handle, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (group < 0)
		return 0;
	char link[32], path[64]; /* longer ones are cut behind the leaf's name */
	snprintf(link, sizeof(link), "/proc/self/fd/%d", group);
	ssize_t length = readlink(link, path, sizeof(path) - 1);
	close(group);
	path[length > 0 ? length : 0] = 0;
	if (strncmp(path, ABOVE, sizeof(ABOVE) - 1))
		return 0;
	pthread_mutex_lock(&lock);
	const struct leaf *leaf = *find_used(0, (uint32_t)strtoul(path + sizeof(ABOVE) - 1, NULL, 10));
	uint32_t stream = leaf ? leaf->stream : 0;
	pthread_mutex_unlock(&lock);
	return stream;
}

static void remove_below(int directory, int depth)
{
	DIR *entries = fdopendir(directory);
	if (!entries) {
		close(directory);
		return;
	}
	struct dirent *entry;
	while ((entry = readdir(entries))) {
		if (entry->d_type != DT_DIR || entry->d_name[0] == '.')
			continue;
		if (unlinkat(directory, entry->d_name, AT_REMOVEDIR) == 0 || depth == MAX_NESTING)
			continue;
		int child = openat(directory, entry->d_name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
		if (child < 0)
			continue;
		remove_below(child, depth + 1);
		unlinkat(directory, entry->d_name, AT_REMOVEDIR);
	}
	closedir(entries);
}

static bool remove_leaf(uint32_t name)
{
	char path[16];
	leaf_path(path, name);
	if (unlinkat(execs, path, AT_REMOVEDIR) == 0 || errno == ENOENT)
		return true;
	int directory = openat(execs, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (directory >= 0)
		remove_below(directory, 0);
	return unlinkat(execs, path, AT_REMOVEDIR) == 0 || errno == ENOENT;
}

bool cgroup_remove(uint32_t stream)
{
	pthread_mutex_lock(&lock);
	struct leaf *leaf = *find_used(stream, 0);
	pthread_mutex_unlock(&lock);
	if (!leaf)
		return true;
	if (!remove_leaf(leaf->name))
		return false;
	pthread_mutex_lock(&lock);
	*find_used(stream, 0) = leaf->next;
	pthread_mutex_unlock(&lock);
	free(leaf);
	return true;
}

void cgroup_kill(int group)
{
	if (!cgroup_write(group, "cgroup.kill", "1"))
		say("kill an exec: %s", strerror(errno));
}

void cgroup_kill_all(void)
{
	if (!cgroup_write(execs, "cgroup.kill", "1"))
		say("kill all execs: %s", strerror(errno));
}

void cgroup_signal_group(int group, pid_t leader, int signal)
{
	int fd = openat(group, "cgroup.procs", O_RDONLY | O_CLOEXEC);
	FILE *processes = fd < 0 ? NULL : fdopen(fd, "re");
	if (!processes) {
		if (fd >= 0)
			close(fd);
		return;
	}
	/* The leader may be gone and its number another's: only a living member of the group proves that the group is this one. */
	char line[16];
	bool found = false;
	while (!found && fgets(line, sizeof(line), processes))
		found = getpgid(atoi(line)) == leader;
	fclose(processes);
	if (found)
		kill(-leader, signal);
}

int cgroup_open_events(int group)
{
	return openat(group < 0 ? execs : group, "cgroup.events", O_RDONLY | O_CLOEXEC);
}

bool cgroup_event(int events, const char *line)
{
	char text[128] = "";
	ssize_t length = pread(events, text, sizeof(text) - 1, 0);
	return length > 0 && strstr(text, line) != NULL;
}

void cgroup_freeze_all(bool freeze)
{
	if (!cgroup_write(execs, "cgroup.freeze", freeze ? "1" : "0"))
		say("%s the execs: %s", freeze ? "freeze" : "thaw", strerror(errno));
}
