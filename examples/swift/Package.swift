// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "D2CPack",
    platforms: [.macOS(.v13), .iOS(.v16)],
    products: [
        .library(name: "D2CPack", targets: ["D2CPack"]),
        .executable(name: "d2c-pack", targets: ["d2c-pack"]),
    ],
    targets: [
        .target(name: "D2CPack"),
        .executableTarget(name: "d2c-pack", dependencies: ["D2CPack"]),
        .testTarget(name: "D2CPackTests", dependencies: ["D2CPack"]),
    ]
)
