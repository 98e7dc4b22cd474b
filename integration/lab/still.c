/* A virtual CPU that never runs: the lab starts this before the command and leaves it.
 *
 * While a CPU exists whose APIC is off, KVM does not rewrite its own code each time another one's is switched.
 * QEMU now and then runs code that another CPU is just rewriting wrongly, and the emulated host dies of it.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int must(int result, const char *operation)
{
    if (result < 0)
        err(1, "%s", operation);
    return result;
}

int main(void)
{
    struct kvm_enable_cap split = { .cap = KVM_CAP_SPLIT_IRQCHIP };
    int kvm = must(open("/dev/kvm", O_RDWR), "open /dev/kvm");
    int vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    must(ioctl(vm, KVM_ENABLE_CAP, &split), "KVM_CAP_SPLIT_IRQCHIP");
    must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    /* The lab waits for the end of this stream. */
    fclose(stdout);
    for (;;)
        pause();
}
