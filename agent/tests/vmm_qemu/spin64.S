	.globl _start
_start:
	pause
	jmp _start
