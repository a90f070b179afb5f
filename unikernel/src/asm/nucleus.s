# The nucleus: all that runs in ring 0 after boot.
#
#   interrupts   count and signal end of interrupt; they never run code
#   exceptions   go one way: registers to REPORT_FRAME, on to hyv_report in ring 3, never back
#   services     int3 with rax = SERVICE + n: halt, link, rdmsr, wrmsr
#
# No stack but one page, no re-entrancy, no vector registers. Written for one vCPU.

.section .nucleus.text, "ax", @progbits
.code64

# The host's wake-up.
hyv_wake:
    push %rax
    incq HYV_WAKES
    # If it came before hlt ran, do not sleep: the count has moved.
    cmpq $hyv_halt_sleep, 8(%rsp)
    jne 1f
    incq 8(%rsp)                        # hlt is one byte
1:  movabs ${LAPIC} + 0xb0, %rax
    movl $0, (%rax)
    pop %rax
hyv_ignore:
    iretq

# int3. In: rax service, rdi and rsi arguments. Out: rax. Changes rcx, rdx, rsi, rdi.
hyv_service:
    testb $3, 8(%rsp)
    jz hyv_exc_3
    sub ${SERVICE}, %rax
    jz hyv_halt
    dec %rax
    jz hyv_link
    dec %rax
    jz hyv_rdmsr
    dec %rax
    jz hyv_wrmsr
    add ${SERVICE} + 3, %rax            # none of ours: a breakpoint
    jmp hyv_exc_3

# halt(rdi = seen): sleep, unless a wake-up came since the caller read `seen`. Interrupts are off here
# until sti, and sti holds them back until hlt has begun.
hyv_halt:
    cmp %rdi, HYV_WAKES
    jne 1f
    sti
hyv_halt_sleep:
    hlt
    cli
1:  iretq

# link(rdi = page directory, rsi = which GiB): seal a page of the pool and make it map that GiB.
# rax = 0, or -1 if the page is not in the pool or the GiB is taken. The page's entries are the caller's own business.
hyv_link:
    mov $-1, %rax
    lea -1(%rsi), %rdx
    cmp ${DEVICE_GIB} - 1, %rdx
    jae 1f
    cmpq $0, hyv_pdpt(,%rsi,8)
    jne 1f
    test $0xfff, %edi
    jnz 1f
    cmp $hyv_pool, %rdi
    jb 1f
    cmp $hyv_pool_end, %rdi
    jae 1f
    mov %rdi, %rdx
    shr $12, %rdx
    lea 0x61(%rdi), %rcx                # present, supervisor, read-only, no-execute
    bts $63, %rcx
    mov %rcx, hyv_pt_image - {NUCLEUS} / 512(,%rdx,8)
    invlpg (%rdi)
    lea 0x27(%rdi), %rcx
    mov %rcx, hyv_pdpt(,%rsi,8)
    xor %eax, %eax
1:  iretq

# rdmsr(rdi = register): rax = its value.
hyv_rdmsr:
    mov %edi, %ecx
    rdmsr
    shl $32, %rdx
    or %rdx, %rax
    iretq

# wrmsr(rdi = register, rsi = value).
hyv_wrmsr:
    mov %edi, %ecx
    mov %esi, %eax
    mov %rsi, %rdx
    shr $32, %rdx
    wrmsr
    iretq

# Exceptions: vectors whose error code the CPU does not push push a zero.
.irp n, 0,1,2,3,4,5,6,7,9,15,16,18,19,20,22,23,24,25,26,27,28,31
hyv_exc_\n:
    pushq $0
    pushq $\n
    jmp hyv_exception
.endr
.irp n, 8,10,11,12,13,14,17,21,29,30
hyv_exc_\n:
    pushq $\n
    jmp hyv_exception
.endr

hyv_exception:
    push %rax
    push %rbx
    push %rcx
    push %rdx
    push %rsi
    push %rdi
    push %rbp
    push %r8
    push %r9
    push %r10
    push %r11
    push %r12
    push %r13
    push %r14
    push %r15
    mov %cr2, %rax
    push %rax
    # While boot probes the CPU: the reporter is code for a CPU that this one is not.
    mov 0x90(%rsp), %rax                # rip
    cmp $hyv_probe_ring0, %rax
    jb 1f
    cmp $hyv_probe_ring0_end, %rax
    jb hyv_no_v3
1:  cmp $hyv_probe, %rax
    jb 2f
    cmp $hyv_probe_end, %rax
    jb hyv_no_v3
2:
    # An exception in the reporter itself: nothing is left but to end.
    cmpl $0, hyv_reporting
    jne hyv_die
    movl $1, hyv_reporting
    cld
    mov %rsp, %rsi
    mov ${REPORT_FRAME}, %edi
    mov $23, %ecx
    rep movsq
    pushq $0x23
    pushq ${REPORT_FRAME}
    pushq $0x202
    pushq $0x1b
    pushq $hyv_report_entry
    iretq

hyv_die:
    mov ${EXIT_PORT}, %edx
    mov ${EXIT_FAILURE}, %eax
    out %eax, %dx
    cli
    hlt
    jmp hyv_die

.section .text.hyv_report_entry, "ax", @progbits
hyv_report_entry:
    xor %ebp, %ebp
    mov ${REPORT_FRAME}, %edi
    call hyv_report
    ud2
