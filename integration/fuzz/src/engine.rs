//! libFuzzer, which calls back for each input and ends the process itself.
#![allow(unsafe_code)] // it is C++

use std::ffi::{CString, c_char, c_int};
use std::sync::{Mutex, OnceLock, PoisonError};

use libfuzzer_sys as _;
use mvm_fuzz::{Reach, Target};

static TARGET: OnceLock<Target> = OnceLock::new();
static REACHED: Mutex<Option<Reach>> = Mutex::new(None);

unsafe extern "C" {
    fn LLVMFuzzerRunDriver(
        argc: *mut c_int,
        argv: *mut *mut *mut c_char,
        callback: extern "C" fn(*const u8, usize) -> c_int,
    ) -> c_int;
}

extern "C" fn take(data: *const u8, size: usize) -> c_int {
    // The first input is none, of which there need not be a pointer.
    let bytes = if size == 0 {
        &[]
    } else {
        // SAFETY: libFuzzer says that so many bytes are there until this returns.
        unsafe { std::slice::from_raw_parts(data, size) }
    };
    one(bytes)
}

fn one(bytes: &[u8]) -> c_int {
    if let Some(target) = TARGET.get() {
        let reach = target.once(bytes);
        REACHED.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().merge(&reach);
    }
    0
}

/// What the library's own way in calls; it is not used, and must be there.
// SAFETY: no other function has this name.
#[unsafe(no_mangle)]
#[allow(improper_ctypes_definitions)] // as the library declares it
extern "C" fn rust_fuzzer_test_input(bytes: &[u8]) -> i32 {
    one(bytes)
}

extern "C" fn tell() {
    let reached = REACHED.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
    for (name, n) in reached.iter() {
        super::campaign::tell(name, n);
    }
}

/// Fuzzes `target`. Ends the process, unless libFuzzer cannot begin.
pub(super) fn run(target: Target, options: &[&str]) -> Result<(), String> {
    let _ = TARGET.set(target);
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        // A device's thread may be the one that panics; libFuzzer keeps the input when the process is aborted.
        std::process::abort();
    }));
    // SAFETY: it is a function without arguments.
    unsafe { libc::atexit(tell) };
    let words = std::iter::once("mvm-fuzz").chain(options.iter().copied());
    let words: Result<Vec<CString>, _> = words.map(CString::new).collect();
    let words = words.map_err(|error| error.to_string())?;
    let mut pointers: Vec<*mut c_char> = words.iter().map(|word| word.as_ptr().cast_mut()).collect();
    let mut count = c_int::try_from(pointers.len()).map_err(|error| error.to_string())?;
    pointers.push(std::ptr::null_mut());
    let mut argv = pointers.as_mut_ptr();
    // SAFETY: the words and the list of them live until the process ends, as `argv` of a program does.
    match unsafe { LLVMFuzzerRunDriver(&raw mut count, &raw mut argv, take) } {
        0 => Ok(()),
        code => Err(format!("libFuzzer ends with {code}")),
    }
}
