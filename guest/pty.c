/* Pseudo terminals. The follower is opened through the leader (TIOCGPTPEER): what the guest mounts over /dev/pts does not matter,
 * and a /dev/ptmx that is no terminal any more fails with ENOTTY.
 */
#include "pty.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <termios.h>
#include <unistd.h>

enum { TTY_GROUP = 5 }; /* the mount's gid= (boot.c): write(1) and its like */

static bool read_number(const uint8_t *map, size_t length, const char *key, unsigned short *number)
{
	struct msgpack_value value;
	if (!msgpack_find(map, length, key, &value) || value.type != MSGPACK_INTEGER || value.integer < 0 ||
	    value.integer > UINT16_MAX)
		return false;
	*number = (unsigned short)value.integer;
	return true;
}

bool pty_read_size(const uint8_t *map, size_t length, struct winsize *size)
{
	*size = (struct winsize){0};
	return read_number(map, length, "rows", &size->ws_row) && read_number(map, length, "cols", &size->ws_col);
}

/* The kernel's defaults are those of a login terminal, but for erasing a character of more than one byte. */
static void speak_utf8(int leader)
{
	struct termios settings;
	if (tcgetattr(leader, &settings) < 0) /* of the leader too, these are the follower's */
		return;
	settings.c_iflag |= IUTF8;
	tcsetattr(leader, TCSANOW, &settings);
}

bool pty_open(int *leader, int *follower, const struct winsize *size, uid_t owner, struct failure *failure)
{
	const int unlocked = 0;
	*leader = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
	if (*leader < 0)
		return fail_call(failure, errno, "open of /dev/ptmx");
	if (ioctl(*leader, TIOCSPTLCK, &unlocked) < 0)
		return fail_call(failure, errno, "TIOCSPTLCK");
	*follower = ioctl(*leader, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (*follower < 0)
		return fail_call(failure, errno, "TIOCGPTPEER");
	if (ioctl(*leader, TIOCSWINSZ, size) < 0)
		return fail_call(failure, errno, "TIOCSWINSZ");
	if (fchown(*follower, owner, TTY_GROUP) < 0)
		return fail_call(failure, errno, "fchown of a terminal");
	speak_utf8(*leader);
	return true;
}

/* The kernel tells it of the follower only: the leader's own queue is what programs write. */
bool pty_is_unread(int leader)
{
	struct pollfd follower = {.fd = ioctl(leader, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC), .events = POLLIN};
	if (follower.fd < 0)
		return false;
	bool unread = poll(&follower, 1, 0) > 0 && follower.revents & POLLIN;
	close(follower.fd);
	return unread;
}

uint8_t pty_end_byte(int leader)
{
	struct termios settings;
	return tcgetattr(leader, &settings) < 0 ? 0 : settings.c_cc[VEOF];
}
