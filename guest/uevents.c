#include "uevents.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "kernel.h"

int uevents_open(void)
{
	struct sockaddr_netlink all = {.family = AF_NETLINK, .groups = 1};
	int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_UEVENT);
	if (fd < 0 || bind(fd, (struct sockaddr *)&all, sizeof(all)) == 0)
		return fd;
	int error = errno;
	close(fd);
	errno = error;
	return -1;
}

int64_t uevents_now(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

bool uevents_wait(int socket, int64_t deadline_ms)
{
	char event[8192];
	struct pollfd news = {.fd = socket, .events = POLLIN};
	int64_t left = deadline_ms - uevents_now();
	if (left <= 0)
		return false;
	poll(&news, 1, (int)left);
	while (recv(socket, event, sizeof(event), 0) > 0)
		continue;
	return true;
}
