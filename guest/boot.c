/* Boot as PID 1 of an initramfs: /modules/NN-name.ko in order, the three ports by their names, /dev/vda as the root.
 *
 * Devices appear some time after their driver: the kernel says so in uevents (lib/kobject_uevent.c), which are waited for; nothing
 * is polled by time.
 */
#include "boot.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernel.h"
#include "limits.h"
#include "log.h"
#include "tree.h"
#include "uevents.h"

#define NEW_ROOT "/newroot"
#define PORTS "/sys/class/virtio-ports"
enum { DEVICE_SECONDS = 10 };

static void mount_on(const char *type, const char *path, unsigned long flags, const char *options)
{
	if (mkdir(path, 0755) < 0 && errno != EEXIST)
		say("make %s: %s", path, strerror(errno));
	if (mount(type, path, type, flags, options) < 0)
		say("mount %s on %s: %s", type, path, strerror(errno));
}

/* Modules. */

static int module_file(const struct dirent *entry)
{
	size_t length = strlen(entry->d_name);
	return length > 3 && !strcmp(entry->d_name + length - 3, ".ko");
}

static void load_module(const char *name)
{
	char path[NAME_MAX + sizeof("/modules/")];
	snprintf(path, sizeof(path), "/modules/%s", name);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
		say("load module %s: %s", name, strerror(errno));
	if (fd >= 0)
		close(fd);
	unlink(path); /* the initramfs is memory */
}

static void load_modules(void)
{
	struct dirent **names;
	int count = scandir("/modules", &names, module_file, alphasort);
	if (count < 0)
		say("read /modules: %s", strerror(errno));
	for (int i = 0; i < count; i++) {
		load_module(names[i]->d_name);
		free(names[i]);
	}
	if (count >= 0)
		free(names);
}

/* Devices. */

static bool has_name(const char *device, const char *name)
{
	char path[NAME_MAX + sizeof(PORTS "//name")], text[64];
	snprintf(path, sizeof(path), PORTS "/%s/name", device);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	ssize_t length = read(fd, text, sizeof(text));
	close(fd);
	return length == (ssize_t)strlen(name) + 1 && !memcmp(text, name, strlen(name));
}

static int open_port(const char *name)
{
	DIR *devices = opendir(PORTS);
	int fd = -1;
	struct dirent *entry;
	while (devices && fd < 0 && (entry = readdir(devices))) {
		char path[NAME_MAX + sizeof("/dev/")];
		if (entry->d_name[0] == '.' || !has_name(entry->d_name, name))
			continue;
		snprintf(path, sizeof(path), "/dev/%s", entry->d_name);
		fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
	}
	if (devices)
		closedir(devices);
	return fd;
}

static const char *missing_device(struct boot_ports *ports)
{
	if (ports->control < 0 && (ports->control = open_port(PORT_CONTROL)) < 0)
		return PORT_CONTROL;
	if (ports->fs < 0 && (ports->fs = open_port(PORT_FS)) < 0)
		return PORT_FS;
	if (ports->net < 0 && (ports->net = open_port(PORT_NET)) < 0)
		return PORT_NET;
	return access(ROOT_DISK, F_OK) < 0 ? ROOT_DISK : NULL;
}

static void wait_for_devices(int uevents, struct boot_ports *ports)
{
	int64_t deadline = uevents_now() + DEVICE_SECONDS * 1000;
	const char *missing;
	while ((missing = missing_device(ports)))
		if (!uevents_wait(uevents, deadline))
			fatal("wait for %s: it did not appear within %d s", missing, DEVICE_SECONDS);
}

/* The root. */

static void carry_mount(const char *path)
{
	char target[64];
	snprintf(target, sizeof(target), NEW_ROOT "%s", path);
	if (mkdir(target, 0755) < 0 && errno != EEXIST)
		say("make %s: %s", target, strerror(errno));
	if (mount(path, target, NULL, MS_MOVE, NULL) < 0)
		fatal("move %s to %s: %s", path, target, strerror(errno));
}

static void enter_root(void)
{
	mkdir(NEW_ROOT, 0755);
	int result = mount(ROOT_DISK, NEW_ROOT, "ext4", MS_NOATIME, NULL);
	if (result < 0 && (errno == EROFS || errno == EACCES)) /* a disk that the host serves read-only */
		result = mount(ROOT_DISK, NEW_ROOT, "ext4", MS_NOATIME | MS_RDONLY, NULL);
	if (result < 0)
		fatal("mount %s on %s: %s", ROOT_DISK, NEW_ROOT, strerror(errno));
	carry_mount("/proc");
	carry_mount("/sys");
	carry_mount("/dev");
	unlink("/init");
	if (chdir(NEW_ROOT) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
		fatal("make %s the root: %s", NEW_ROOT, strerror(errno));
}

static void mount_the_rest(void)
{
	static const char *const LINKS[][2] = {
		{"/proc/self/fd", "/dev/fd"},
		{"/proc/self/fd/0", "/dev/stdin"},
		{"/proc/self/fd/1", "/dev/stdout"},
		{"/proc/self/fd/2", "/dev/stderr"},
	};
	for (size_t i = 0; i < ARRAY_SIZE(LINKS); i++)
		if (symlink(LINKS[i][0], LINKS[i][1]) < 0 && errno != EEXIST)
			say("link %s: %s", LINKS[i][1], strerror(errno));
	mount_on("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666");
	mount_on("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777");
	mount_on("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=755");
}

/* What every distribution's init sets: in directories that others may write to, nobody can be led to another's file by a link. */
static void protect_links(void)
{
	static const char *const SETTINGS[] = {
		"/proc/sys/fs/protected_hardlinks", "/proc/sys/fs/protected_symlinks",
		"/proc/sys/fs/protected_fifos", "/proc/sys/fs/protected_regular",
	};
	for (size_t i = 0; i < ARRAY_SIZE(SETTINGS); i++) {
		int fd = open(SETTINGS[i], O_WRONLY | O_CLOEXEC);
		if (fd < 0 || write(fd, "1", 1) < 0)
			say("write %s: %s", SETTINGS[i], strerror(errno));
		if (fd >= 0)
			close(fd);
	}
}

/* What makes a guest this one and no other lies in memory, where `identity` writes it: on disk that would cost each start 40 ms
 * without KVM (the emulator has not yet translated the file system's code), and a saved disk would hold it. */
static void link_identity(void)
{
	static const char *const LINKS[][2] = {
		{"/run/taskvm/hostname", "/etc/hostname"},
		{"/run/taskvm/hosts", "/etc/hosts"},
		{"/run/taskvm/machine-id", "/etc/machine-id"},
		{"/run/taskvm/ca.crt", "/etc/ssl/certs/ca-certificates.crt"},
		{"/run/taskvm/cacerts", "/etc/ssl/certs/java/cacerts"},
		{"/run/taskvm/ca.crt", "/usr/local/share/ca-certificates/taskvm.crt"},
	};
	if (mkdir("/run/taskvm", 0755) < 0)
		say("make /run/taskvm: %s", strerror(errno));
	for (size_t i = 0; i < ARRAY_SIZE(LINKS); i++) {
		struct failure failure = {0};
		unlink(LINKS[i][1]);
		if (!tree_make_parents(LINKS[i][1], (struct owner){0, 0}, &failure) ||
		    symlink(LINKS[i][0], LINKS[i][1]) < 0)
			say("link %s to %s: %s", LINKS[i][1], LINKS[i][0], strerror(failure.error ? failure.error : errno));
	}
}

void boot(struct boot_ports *ports)
{
	*ports = (struct boot_ports){-1, -1, -1};
	mount_on("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_on("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_on("devtmpfs", "/dev", MS_NOSUID, "mode=755");
	int uevents = uevents_open();
	if (uevents < 0)
		fatal("listen for uevents: %s", strerror(errno));
	load_modules();
	wait_for_devices(uevents, ports);
	close(uevents);
	enter_root();
	mount_the_rest();
	protect_links();
	link_identity();
}
