/* "usage_usec 12" and "254:0 rbytes=1 wbytes=2 …": the two forms of cgroup-v2.rst, Format. */
#include "counters.h"

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

static bool ends_word(char c)
{
	return !c || c == ' ' || c == '\n';
}

static int64_t add_digits(int64_t sum, const char *digits)
{
	int64_t number = 0;
	for (; *digits >= '0' && *digits <= '9'; digits++)
		if (__builtin_mul_overflow(number, 10, &number) || __builtin_add_overflow(number, *digits - '0', &number))
			return INT64_MAX;
	return __builtin_add_overflow(sum, number, &sum) ? INT64_MAX : sum;
}

int64_t counter_sum(const char *text, const char *name)
{
	size_t length = strlen(name);
	int64_t sum = 0;
	if (!length)
		return add_digits(0, text);
	for (const char *at = text; (at = strstr(at, name)); at += length)
		if ((at == text || ends_word(at[-1])) && (at[length] == ' ' || at[length] == '='))
			sum = add_digits(sum, at + length + 1);
	return sum;
}
