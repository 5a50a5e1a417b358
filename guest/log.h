/* The agent's words on the console, and the two ways its life ends. */
#ifndef TASKVM_LOG_H
#define TASKVM_LOG_H

/* One line, "taskvm-guest: …". An error says the operation, its operand and the errno's text. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The agent is PID 1 and must not exit: say why, and turn the machine off. */
_Noreturn void fatal(const char *format, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void power_off(void);

#endif
