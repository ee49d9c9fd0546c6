# A guest that does what the test writes into its RAM. Loaded by QEMU through
# its PVH note; 32-bit flat, no paging, no interrupts.
#
#   0x200000  ticks: counts as long as the guest runs
#   0x201000  command, written by the test (last word first in program order):
#             +0 number  +4 first address  +8 count  +12 stride
#             +16 busy set: first address  +20 pages (0: none)
#   0x202000  +0 number of the last command done  +4 torn pages seen
	.section .note.pvh, "a", @note
	.balign 4
	.long 4, 8, 18
	.asciz "Xen"
	.quad start

	.text
	.code32
	.globl start
start:
	cli
	movl $0x200000, %ebx
turn:
	incl (%ebx)
	movl 0x1000(%ebx), %eax
	cmpl 0x2000(%ebx), %eax
	je busy
	movl 0x1004(%ebx), %edi
	movl 0x1008(%ebx), %ecx
	movl 0x100c(%ebx), %edx
1:	testl %ecx, %ecx
	jz 2f
	movl %eax, (%edi)
	addl %edx, %edi
	decl %ecx
	jmp 1b
2:	movl %eax, 0x2000(%ebx)
busy:
	movl 0x1014(%ebx), %ecx
	testl %ecx, %ecx
	jz turn
	movl 0x1010(%ebx), %edi
	movl (%ebx), %eax
3:	movl (%edi), %edx
	cmpl 0x800(%edi), %edx		# both words of a page are always written together
	je 4f
	incl 0x2004(%ebx)
4:	movl %eax, (%edi)
	movl %eax, 0x800(%edi)
	addl $4096, %edi
	decl %ecx
	jnz 3b
	jmp turn
