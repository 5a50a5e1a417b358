/* What a confined program may still do, and the steps that take the rest away. */
#ifndef CONFINE_JAIL_H
#define CONFINE_JAIL_H

#include <stdbool.h>

#define MAX_PATHS 64

struct jail {
	const char *read[MAX_PATHS];    /* read and list beneath */
	const char *execute[MAX_PATHS]; /* read and execute beneath */
	const char *write[MAX_PATHS];   /* read, write, create beneath */
	int reads, executes, writes;
	const char *copy_on_write; /* opened read-write by the program, given to it read-only */
	unsigned long file_size;   /* RLIMIT_FSIZE in bytes, 0 = unlimited */
	unsigned long data_size;   /* RLIMIT_DATA in bytes, 0 = unlimited */
};

struct jail_report {
	int landlock; /* ABI version, 0 = none */
	bool namespaces;
};

/* Each returns 0, or -1 with a message on standard error. */
int jail_namespaces(struct jail_report *report); /* best effort: never fails, reports */
int jail_limits(const struct jail *jail);
int jail_landlock(const struct jail *jail, struct jail_report *report);
int jail_capabilities(void);
int jail_seccomp(bool notify); /* returns the notification descriptor, or 0 when notify is false */

int fail(const char *operation, const char *operand); /* prints operation, operand, errno; returns -1 */

#endif
