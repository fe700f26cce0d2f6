import Foundation

/// A pack that is refused, or a task that it does not serve.
public struct PackError: Error, CustomStringConvertible {
    /// All that is wrong: place, what was found, and what was expected, in one line each.
    public let problems: [String]
    public var description: String { problems.joined(separator: "\n") }

    init(_ problem: String) { problems = [problem] }
    init(problems: [String]) { self.problems = problems }

    /// The same problems, in a place.
    func at(_ place: String) -> PackError { PackError(problems: problems.map { "\(place): \($0)" }) }
}

/// What is wrong in several parts, so that one does not hide the next.
struct Problems {
    private var found: [String] = []

    /// The value, or nil with what it threw kept.
    mutating func collect<T>(_ read: () throws -> T) throws -> T? {
        do {
            return try read()
        } catch let error as PackError {
            found += error.problems
            return nil
        }
    }

    /// Keep a problem unless a condition holds.
    mutating func need(_ good: Bool, _ problem: @autoclosure () -> String) {
        if !good { found.append(problem()) }
    }

    /// Throw what was kept, the first hundred of it.
    func check() throws {
        guard !found.isEmpty else { return }
        let rest = found.count > 100 ? ["and \(found.count - 100) more problems"] : []
        throw PackError(problems: found.prefix(100) + rest)
    }
}

/// How a message repeats what a stranger wrote: in ASCII, and not all of it.
func shown(_ text: String, most: Int = 60) -> String {
    "'" + text.unicodeScalars.prefix(most).map { $0.escaped(asASCII: true) }.joined() + "'"
}

/// A regular file that is open to be read. A named pipe would never end.
final class PackFile: Sendable {
    let path: String
    let size: Int
    private let descriptor: Int32

    init(_ path: String) throws {
        descriptor = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC)
        guard descriptor >= 0 else { throw PackError("\(shown(path, most: .max)): missing or not readable") }
        self.path = path
        var about = stat()
        let known = fstat(descriptor, &about) == 0 && about.st_mode & S_IFMT == S_IFREG
        size = known ? Int(about.st_size) : 0
        guard known else { throw PackError("\(shown(path, most: .max)): no regular file") }
    }

    deinit { if descriptor >= 0 { close(descriptor) } }

    /// Bytes of the file; throws PackError where it has not so many.
    func read(at start: Int, count: Int) throws -> [UInt8] {
        guard start >= 0, count >= 0, start <= size, count <= size - start else {
            throw PackError("\(shown(path, most: .max)): truncated")
        }
        return try [UInt8](unsafeUninitializedCapacity: count) { buffer, done in
            while done < count {
                let n = pread(descriptor, buffer.baseAddress! + done, count - done, off_t(start + done))
                if n < 0 && errno == EINTR { continue }
                guard n > 0 else { throw PackError("\(shown(path, most: .max)): became shorter while it was read") }
                done += n
            }
        }
    }

    /// Hexadecimal SHA-256 of the content.
    func sha256() throws -> String {
        var hash = FileHash()
        var start = 0
        while start < size {
            let some = try read(at: start, count: min(1 << 20, size - start))
            some.withUnsafeBytes { hash.update(bufferPointer: $0) }
            start += some.count
        }
        return hash.finalize().map { String($0 >> 4, radix: 16) + String($0 & 15, radix: 16) }.joined()
    }

    /// The JSON object that the file holds.
    func json() throws -> [String: JSON] {
        guard size <= 16 << 20 else { throw PackError("\(shown(path, most: .max)): larger than any manifest") }
        do {
            let value = try JSON.parse(read(at: 0, count: size))
            guard let object = value.object else { throw PackError("expected a JSON object") }
            return object
        } catch let error as PackError {
            throw error.at(shown(path, most: .max))
        }
    }
}
