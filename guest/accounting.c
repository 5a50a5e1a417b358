/* Limits are written before the program is put into its cgroup; counters are read when its main process has ended. */
#include "accounting.h"

#include <errno.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "cgroup.h"
#include "counters.h"
#include "kernel.h"

static const struct limit {
	const char *key, *file, *form;
	bool of_disk; /* the line begins with the device that it is about */
} LIMITS[] = {
	{"memory", "memory.max", "%lld", false},
	{"processes", "pids.max", "%lld", false},
	{"cpu_weight", "cpu.weight", "%lld", false},
	{"cpu_us", "cpu.max", "%lld 100000", false}, /* of each 100 ms, the kernel's own default */
	{"disk_read", "io.max", "rbps=%lld", true},
	{"disk_write", "io.max", "wbps=%lld", true},
};

static const struct counter {
	const char *key, *file, *name;
} COUNTERS[] = {
	{"user_us", "cpu.stat", "user_usec"},
	{"system_us", "cpu.stat", "system_usec"},
	{"memory_peak", "memory.peak", ""},
	{"processes_peak", "pids.peak", ""},
	{"read_bytes", "io.stat", "rbytes"},
	{"written_bytes", "io.stat", "wbytes"},
	{"oom_kills", "memory.events", "oom_kill"},
};

/* Write "MAJOR:MINOR " of the disk that the root file system is on, and return its length; an empty text where it is on none. */
static size_t write_disk(char *text, size_t size)
{
	struct stat root;
	*text = 0;
	if (stat("/", &root) < 0)
		return 0;
	return (size_t)snprintf(text, size, "%u:%u ", major(root.st_dev), minor(root.st_dev));
}

bool accounting_limit(int group, const struct request *request, struct failure *failure)
{
	size_t length;
	const uint8_t *limits = request_map(request, "limits", &length);
	for (size_t i = 0; limits && i < ARRAY_SIZE(LIMITS); i++) {
		struct msgpack_value value;
		char text[64];
		if (!msgpack_find(limits, length, LIMITS[i].key, &value) || value.type == MSGPACK_NIL)
			continue;
		if (value.type != MSGPACK_INTEGER || value.integer <= 0)
			return fail_call(failure, EINVAL, LIMITS[i].key);
		size_t start = LIMITS[i].of_disk ? write_disk(text, sizeof(text)) : 0;
		snprintf(text + start, sizeof(text) - start, LIMITS[i].form, (long long)value.integer);
		if (!cgroup_write(group, LIMITS[i].file, text))
			return fail_call(failure, errno, LIMITS[i].file);
	}
	return true;
}

void accounting_write(struct msgpack_writer *map, int group)
{
	char text[4096] = "";
	const char *file = "";
	msgpack_write_map(map, ARRAY_SIZE(COUNTERS));
	for (size_t i = 0; i < ARRAY_SIZE(COUNTERS); i++) {
		if (file != COUNTERS[i].file)
			cgroup_read(group, file = COUNTERS[i].file, text, sizeof(text));
		msgpack_write_string(map, COUNTERS[i].key);
		msgpack_write_integer(map, counter_sum(text, COUNTERS[i].name));
	}
}
