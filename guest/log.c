/* The console, as PID 1 uses it. A line goes out in one write, so lines of several threads do not mix. */
#include "log.h"

#include <stdarg.h>
#include <stdio.h>
#include <sys/reboot.h>
#include <unistd.h>

static void say_line(const char *format, va_list arguments)
{
	char line[512] = "taskvm-guest: ";
	const size_t prefix = sizeof("taskvm-guest: ") - 1;
	int length = vsnprintf(line + prefix, sizeof(line) - prefix - 1, format, arguments);
	size_t end = prefix + (length < 0 ? 0 : (size_t)length);
	if (end > sizeof(line) - 2)
		end = sizeof(line) - 2;
	line[end++] = '\n';
	if (write(STDERR_FILENO, line, end) < 0)
		return; /* there is nowhere left to say so */
}

void say(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	say_line(format, arguments);
	va_end(arguments);
}

_Noreturn void power_off(void)
{
	for (;;) {
		reboot(RB_POWER_OFF);
		pause();
	}
}

_Noreturn void fatal(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	say_line(format, arguments);
	va_end(arguments);
	power_off();
}
