/* The pseudo terminal of a program (pty(7)). */
#ifndef TASKVM_PTY_H
#define TASKVM_PTY_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/types.h>

#include "request.h"

/* Read `rows` and `cols` of a map. False when one is missing or larger than the kernel's number. */
bool pty_read_size(const uint8_t *map, size_t length, struct winsize *size);
/* Open a new terminal of that size; `owner` may open it by its name too. Both ends are close-on-exec, the leader does not block. */
bool pty_open(int *leader, int *follower, const struct winsize *size, uid_t owner, struct failure *failure);
/* Whether something that was typed could be read now: a whole line, or an end of file, where the kernel takes lines apart. */
bool pty_is_unread(int leader);
/* The byte that means end of file to whoever reads the terminal now, or 0 when there is none. */
uint8_t pty_end_byte(int leader);

#endif
