/* The kernel's news of devices (lib/kobject_uevent.c): what waits for one waits for these, and polls nothing by time. */
#ifndef TASKVM_UEVENTS_H
#define TASKVM_UEVENTS_H

#include <stdbool.h>
#include <stdint.h>

/* A socket that hears them from now on, or -1 and errno. */
int uevents_open(void);
/* Wait for the next ones until `deadline_ms` of uevents_now; what they say is dropped. False when it has passed. */
bool uevents_wait(int socket, int64_t deadline_ms);
int64_t uevents_now(void);

#endif
