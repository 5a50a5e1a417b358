/* Numbers in the kernel's text files (cgroup-v2.rst, Format). */
#include "../counters.h"
#include "check.h"

static const char CPU[] = "usage_usec 576076\nuser_usec 152084\nsystem_usec 423992\n";
static const char IO[] = "254:0 rbytes=10 wbytes=20 rios=1\n254:16 rbytes=5 wbytes=7 rios=1\n";

static void a_number_follows_its_name(void)
{
	CHECK(counter_sum(CPU, "user_usec") == 152084);
	CHECK(counter_sum(CPU, "usage_usec") == 576076);
	CHECK(counter_sum("6176768\n", "") == 6176768);
}

static void the_numbers_of_all_devices_are_added(void)
{
	CHECK(counter_sum(IO, "rbytes") == 15);
	CHECK(counter_sum(IO, "wbytes") == 27);
}

static void only_whole_words_count(void)
{
	CHECK(counter_sum("oom_group_kill 3\noom_kill 2\n", "oom_kill") == 2);
	CHECK(counter_sum("xoom_kill 3\n", "oom_kill") == 0);
	CHECK(counter_sum("oom_kill", "oom_kill") == 0);
	CHECK(counter_sum("max\n", "") == 0);
}

static void a_sum_does_not_overflow(void)
{
	CHECK(counter_sum("a 9223372036854775808\n", "a") == INT64_MAX);
	CHECK(counter_sum("a 9223372036854775807\na 1\n", "a") == INT64_MAX);
}

int main(void)
{
	RUN(a_number_follows_its_name);
	RUN(the_numbers_of_all_devices_are_added);
	RUN(only_whole_words_count);
	RUN(a_sum_does_not_overflow);
	return 0;
}
