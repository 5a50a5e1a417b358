/* The cgroups of the execs: /sys/fs/cgroup/exec/<number>, each ended, frozen and removed as a whole (cgroup-v2.rst). */
#ifndef TASKVM_CGROUP_H
#define TASKVM_CGROUP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Mount the hierarchy, enable its controllers, and move the agent into a leaf of its own. */
void cgroup_init(void);
/* Have a leaf lie ready. Making one is a tenth of what the first command of a fork costs where the processor is emulated; it is
 * done before a machine is saved, and never for a second command. */
void cgroup_prepare(void);
/* Take the leaf that lies ready or make one, and return a descriptor of it, or -1 and errno. */
int cgroup_make(uint32_t stream);
/* Write one of the group's files; false and errno when the kernel refuses. */
bool cgroup_write(int group, const char *file, const char *text);
/* Read the beginning of one of the group's files, as a string; an empty one when it cannot be read. */
void cgroup_read(int group, const char *file, char *text, size_t size);
/* The exec that the cgroup with the kernel's number `id` belongs to, itself or nested below it; 0 for another one. */
uint32_t cgroup_owner(uint64_t id);
/* Remove the leaf and what was made below it. False while a process lives in it. */
bool cgroup_remove(uint32_t stream);
void cgroup_kill(int group);
/* Signal the process group `leader` as far as it is in `group`. */
void cgroup_signal_group(int group, pid_t leader, int signal);
/* A descriptor that polls EPOLLPRI when `populated` or `frozen` change; of all execs when `group` is -1. */
int cgroup_open_events(int group);
bool cgroup_event(int events, const char *line);
void cgroup_freeze_all(bool freeze);
/* Kill every exec. */
void cgroup_kill_all(void);

#endif
